"""The processes of a run: how they start, agree, watch each other, receive signals and exit."""
