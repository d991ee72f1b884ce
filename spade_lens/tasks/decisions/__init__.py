"""Decision tasks: questions answered by one of a few words, in splits that never mix."""
