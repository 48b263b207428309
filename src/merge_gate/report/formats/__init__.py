"""One module for each format of a report. None imports another one."""
