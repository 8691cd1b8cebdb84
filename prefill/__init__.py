"""The pool that reads prompts."""
