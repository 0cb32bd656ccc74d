"""One file per command: its arguments and its story.

Each module (but `options`, what they share) declares

    NAME: str                     what the user types
    HELP: str                     one line for `mtx --help`
    add_arguments(parser)         its arguments, added to an argparse parser
    run(args) -> int              does it; returns the exit code

Invariant: importing a command imports nothing heavy; JAX and the rooms above it are imported inside `run()`.
"""
