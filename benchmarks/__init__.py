"""Measurements of speed, run by hand; they print numbers and assert nothing."""
