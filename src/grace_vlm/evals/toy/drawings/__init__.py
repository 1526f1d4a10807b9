"""Pictures of the toy suite that the demo's scenes do not have: one kind of picture a file, laid out as those are."""
