"""The pool that writes answers."""
