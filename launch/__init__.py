"""Starts the processes of a run wherever they are to run, and starts them again: `python -m launch TARGET`.

A login node runs it: the standard library of Python 3.9 and nothing else. It knows commands, environment variables,
exit codes and the names of a few files of a run directory; it never imports what it starts.
"""
