"""What all other packages use: errors and exits, redaction, untrusted text and paths, durable files. Imports none of them."""
