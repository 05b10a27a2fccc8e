"""A script and its terminal. Scripts import this before torch, and only when they are run."""

import os
import re
import signal
import sys

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # Ctrl-C while torch loads shows no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
while os.open(os.devnull, os.O_RDWR) < 2:  # closed streams: otherwise a checkpoint would be opened in their place
    pass
sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
for stream in sys.stdout, sys.stderr:
    stream.reconfigure(errors="backslashreplace")  # for what its encoding lacks
    control = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # in a file's name these command the terminal
    stream.write = lambda text, write=stream.write: write(control.sub(lambda c: ascii(c[0])[1:-1], text))
