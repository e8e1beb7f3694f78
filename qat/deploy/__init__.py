"""Deploy configs of other tools: read as they are, and run with this project's export, engines, verification and comparison."""
