"""Instruments and logs that every part above may use."""
