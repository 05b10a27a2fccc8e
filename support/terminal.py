"""A script and its terminal. Scripts import this before torch, and only when they are run."""

import io
import os
import re
import signal
import sys


class PlainText(io.TextIOWrapper):
    """A stream for any text: it escapes what its encoding lacks, and control characters, which a file's name may hold
    and which command a terminal."""

    def write(self, text):
        return super().write(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text))


if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # torch loads for seconds: no traceback of that
    signal.signal(signal.SIGINT, signal.SIG_DFL)
while os.open(os.devnull, os.O_RDWR) < 2:  # closed streams: otherwise a checkpoint would be opened in their place
    pass
for name, number in ("stdout", 1), ("stderr", 2):
    stream = getattr(sys, name) or open(number, "w", closefd=False)
    how = dict(line_buffering=stream.line_buffering or number == 2, write_through=number == 2)
    setattr(sys, name, PlainText(stream.detach(), stream.encoding, "backslashreplace", **how))
