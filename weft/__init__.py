"""What Weft's services share: the contract (messages, subjects, codec, errors) and the chassis (bus, lifecycle, settings)."""
