"""What everything stands on: errors and exits, redaction, untrusted text and paths, sealed folders. Imports nothing of ours."""
