"""The machine and the process: devices, compilation, errors, files, downloads. Nothing about models or text."""
