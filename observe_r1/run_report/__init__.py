"""`observe-r1 report`: one HTML page of a run, from the files that it left or is still writing."""
