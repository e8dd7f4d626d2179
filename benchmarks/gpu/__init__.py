"""The figures that need a GPU: README.md says how to run them and what each means."""
