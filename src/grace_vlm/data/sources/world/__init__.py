"""The mix ``world``: questions on pictures of things that have names, made from packages that anyone can install."""
