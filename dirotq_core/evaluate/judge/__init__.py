"""A vision-language model as a judge: a protocol of this project, described in docs/evaluate.md."""
