"""The commands of the command line, a file for each kind; heavy imports wait until a command runs."""
