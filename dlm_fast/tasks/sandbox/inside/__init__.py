"""What runs inside the sandbox: alone with the standard library, never with the package."""

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
"""what of /dev there is inside"""
