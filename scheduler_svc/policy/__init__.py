"""Whether, when and where: each policy is a short file's class, found by its name in the file's registry."""
