"""A training put together and run: build, step, loop, engines."""
