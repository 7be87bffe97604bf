"""Planning: values in, values out. Nothing here imports Ray or Lance, logs, or does I/O."""
