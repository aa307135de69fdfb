"""The side of a script that its user sees: commands, errors, progress."""
