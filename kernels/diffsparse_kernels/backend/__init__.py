"""Implementations of the kernels, each ignorant of the others."""
