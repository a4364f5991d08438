"""Settings of methods, models and runs, as files: a package so that pip installs them beside the programs."""
