"""One file per place where a run can be started. Each module declares

HELP: str                            one line for `python -m launch --help`
add_arguments(parser)                its arguments, added to those of every target
make_job(args, command) -> Job       raises LaunchError
render(job) -> str                   what would be started, as text; pure
submit(job) -> int                   starts it; returns the exit code
"""
