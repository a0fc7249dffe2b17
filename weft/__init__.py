"""What the services share: contract (messages, subjects, codec, errors) and chassis (bus, lifecycle, settings)."""
