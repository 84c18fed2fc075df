"""The commands, one file each: its arguments (``add_parser``), what it does (``run``), and what it prints.

None imports torch at its top, so that ``--help`` and a wrong argument are answered at once.
"""
