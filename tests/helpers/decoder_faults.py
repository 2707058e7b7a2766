"""Images that crash the decoder process or hang it."""

# runs in the decoder before its own code: an image with the word CRASH or HANG crashes or hangs the process
FAULTS = """
import os, signal, sys
if "engine.preprocess.decoder" in sys.orig_argv:
    from engine.preprocess.codecs import decode as codecs
    decode = codecs.decode
    def faulty(image, header, **least):
        if b"CRASH" in image:
            os.kill(os.getpid(), signal.SIGSEGV)
        if b"HANG" in image:
            signal.sigwait({signal.SIGUSR2})
        return decode(image, header, **least)
    codecs.decode = faulty
"""
