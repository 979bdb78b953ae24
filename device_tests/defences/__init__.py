"""Published defences of the input, one module each: what the project's own are measured against."""
