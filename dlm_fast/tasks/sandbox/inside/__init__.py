"""What runs inside the sandbox: alone with the standard library, never with the package."""
