"""The health of the distillation: what a sample of tokens says of pairs, filters and the teacher. docs/vitals.md."""
