"""The one diffusion engine, indifferent to the shape of what it generates."""
