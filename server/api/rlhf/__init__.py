"""Routes for RLHF workers. What they share: `roles` finds the models, `prompts` makes token ids of what was sent,
`groups` asks the engine, `evaluation` calculates."""
