"""Pictures that a person can look at; no file here knows a letter of the equation."""
