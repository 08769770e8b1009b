"""The command ``baft``: :mod:`.main` reads the command line, and one module a command holds its options and its work.

A command's module is imported for every ``--help``, so it imports torch and the library only inside the functions that run
the command. ``baft --help`` takes a tenth of a second that way.
"""
