"""Studies: every number of results/ and the commands that make it again."""
