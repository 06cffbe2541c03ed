"""Devices, shardings and the processes of several hosts."""
