"""The ``prac`` command: a parser and a function for each subcommand."""
