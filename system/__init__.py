"""The machine and the process: device, compilation, errors, files, downloads."""
