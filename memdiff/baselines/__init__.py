"""The controls and peers of hallucination: what else can make features for the tail."""
