"""Comparisons that only a GPU can judge; with size=tiny they run on any machine."""
