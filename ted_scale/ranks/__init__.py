"""The processes of a run: how they start, agree, watch each other, hear signals and end."""
