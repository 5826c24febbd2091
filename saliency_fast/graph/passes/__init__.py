"""Passes over a recorded program: each takes a program and gives an equal one."""
