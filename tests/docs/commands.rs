//! Commands in the documentation: the program parses each one, and the shell each script.

use std::process::Command;

use clap::Parser as _;
use ifnewer::cli::Cli;

use crate::text::{blocks, documents, read};

#[test]
fn every_command_is_accepted_by_the_parser() {
    let mut checked = 0;
    for block in blocks(&["sh", "text", "yaml"]) {
        for line in block.text.lines() {
            checked += check_line(&block.place(), line);
        }
    }
    for document in documents() {
        for span in read(&document).split('`').skip(1).step_by(2) {
            checked += check_line(&document.display().to_string(), span);
        }
    }
    assert!(checked > 50, "hardly any command was found: {checked}");
}

/// Checks the commands in a line. Returns how many there were.
fn check_line(place: &str, line: &str) -> usize {
    let line = line.trim().trim_start_matches("$ ");
    let line = line.split(" #").next().unwrap_or_default();
    let mut checked = 0;
    for command in line.split(['|', ';', '>', '(']).flat_map(|part| part.split("&&")) {
        let words: Vec<_> = command
            .split_whitespace()
            .map(|word| word.trim_matches(['\'', '"', ')', ',']))
            .take_while(|word| !["…", "<", "*"].contains(word))
            .map(with_value)
            .collect();
        // The name alone is not a command.
        if words.first() != Some(&"ifnewer") || words.len() < 2 {
            continue;
        }
        let parsed = Cli::try_parse_from(&words);
        if let Err(error) = parsed
            && error.use_stderr()
            && !is_unfinished(command, &error)
        {
            panic!("{place}: `{}`: {error}", words.join(" "));
        }
        checked += 1;
    }
    checked
}

/// Replaces placeholders by values.
fn with_value(word: &str) -> &str {
    match word {
        "CLIENT" => "docker",
        other => other,
    }
}

/// `ifnewer ca` in a sentence, or followed by dots: the subcommand is missing, so it cannot be checked.
fn is_unfinished(command: &str, error: &clap::Error) -> bool {
    use clap::error::ErrorKind::{
        DisplayHelpOnMissingArgumentOrSubcommand, MissingRequiredArgument, MissingSubcommand,
    };
    let missing = [
        DisplayHelpOnMissingArgumentOrSubcommand,
        MissingRequiredArgument,
        MissingSubcommand,
    ];
    missing.contains(&error.kind()) && (command.contains('…') || command.split_whitespace().count() == 2)
}

#[test]
fn every_script_is_valid_shell_syntax() {
    for block in blocks(&["sh"]) {
        let read = Command::new("bash")
            .args(["-n", "-c", &block.text])
            .output()
            .unwrap();
        assert!(
            read.status.success(),
            "{}: {}",
            block.place(),
            String::from_utf8_lossy(&read.stderr)
        );
    }
}
