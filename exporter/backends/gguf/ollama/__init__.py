"""The Modelfile for Ollama, and its template."""
