"""Questions about the method; each file is a program, called as `python -m research.NAME`."""
import signal
import sys

if sys.argv[0] == "-m":         # while such a program loads torch, an interrupt needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
