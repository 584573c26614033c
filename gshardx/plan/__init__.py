"""Compile for any mesh, without the hardware, and report."""
