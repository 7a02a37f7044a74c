"""The command line: settings, help, and what a person sees."""
