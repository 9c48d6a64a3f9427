"""`unmask serve`: OpenAI's routes on the generation engine."""
