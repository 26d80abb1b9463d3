//! Three examples for each command's `--help`. A test below parses them all.

/// Shown below the list of commands.
pub const PROGRAM: &str = "\
Examples:
  nfold fold my-checkpoint
  nfold classify photo.jpg
  nfold serve --port 9000";

/// `nfold fold`.
pub const FOLD: &str = "\
Examples:
  nfold fold my-checkpoint
  nfold fold timm/nf_regnet_b1.ra2_in1k --name flowers --model-version 2 --size 288
  nfold fold my-checkpoint --name flowers8 --precision int8 --calibrate photos --repository /srv/models";

/// `nfold classify`.
pub const CLASSIFY: &str = "\
Examples:
  nfold classify photo.jpg
  nfold classify --recursive photos --output answers.csv
  nfold classify --model flowers --top-k 1 --format jsonl -";

/// `nfold eval`.
pub const EVAL: &str = "\
Examples:
  nfold eval photos
  nfold eval test.csv --model flowers --limit 1000 --json
  nfold eval photos --predictions new.jsonl --against old.jsonl --report report";

/// `nfold serve`.
pub const SERVE: &str = "\
Examples:
  nfold serve timm/nf_regnet_b1.ra2_in1k
  nfold serve --port 9000 --model flowers --repository /srv/models
  nfold serve --http localhost:8000 --api-key-file keys.txt --log-format json

Then: curl --data-binary @photo.jpg localhost:8000/v1/classify";

/// `nfold healthcheck`.
pub const HEALTHCHECK: &str = "\
Examples:
  nfold healthcheck
  nfold healthcheck --admin :9002
  nfold healthcheck --admin localhost:8002 --timeout 500ms";

/// `nfold inspect`.
pub const INSPECT: &str = "\
Examples:
  nfold inspect flowers
  nfold inspect repository/flowers/1
  nfold inspect my-checkpoint --json";

/// `nfold bench engine`.
pub const BENCH_ENGINE: &str = "\
Examples:
  nfold bench engine
  nfold bench engine nf_regnet_b1 resnet50 --threads 1,2
  nfold bench engine my-checkpoint repository/flowers/1 --report report";

/// `nfold bench load`.
pub const BENCH_LOAD: &str = "\
Examples:
  nfold bench load --image photo.jpg
  nfold bench load --image photos --connections 1,4,16 --duration 30s
  nfold bench load --image photo.jpg --sweep --slo 100ms --report report";

/// `nfold gamma`.
pub const GAMMA: &str = "\
Examples:
  nfold gamma silu
  nfold gamma all
  nfold gamma relu --samples 1000000 --json";

/// `nfold spp`.
pub const SPP: &str = "\
Examples:
  nfold spp --arch nf_resnet50
  nfold spp my-checkpoint
  nfold spp my-checkpoint --images photos --json";

/// `nfold completions`.
pub const COMPLETIONS: &str = "\
Examples:
  nfold completions bash
  nfold completions zsh
  nfold completions fish";

/// `nfold man`.
pub const MAN: &str = "\
Examples:
  nfold man .
  nfold man man1
  nfold man /usr/local/share/man/man1";

/// `nfold init`, with the names of all architectures.
pub fn init() -> String {
    let mut text = String::from(
        "\
Examples:
  nfold init nf_regnet_b1 --out fresh
  nfold init resnet50 --out fresh --num-classes 10 --seed 1
  nfold init nf_resnet50 --out fresh --model-args '{\"width_factor\": 0.5}'

Architectures:
",
    );
    let mut line = String::new();
    for name in crate::nets::architectures() {
        if line.len() + name.len() > 90 {
            text.push_str(&format!("  {}\n", line.trim_end()));
            line.clear();
        }
        line.push_str(name);
        line.push(' ');
    }
    text + "  " + line.trim_end()
}

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory as _};

    use crate::cli::Cli;

    fn examples(command: &Command) -> Vec<String> {
        let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        text.lines().filter_map(|line| line.strip_prefix("  nfold ")).map(String::from).collect()
    }

    #[test]
    fn every_command_has_three_and_takes_them() {
        let mut commands = vec![Cli::command()];
        while let Some(command) = commands.pop() {
            commands.extend(command.get_subcommands().filter(|c| !c.is_hide_set()).cloned());
            if command.get_name() == "bench" {
                continue;
            }
            let examples = examples(&command);
            assert_eq!(examples.len(), 3, "{}", command.get_name());
            for example in examples {
                // the only quotes are around JSON with one space in it
                let quoted = example.replace(": ", ":").replace('\'', "");
                let words = std::iter::once("nfold").chain(quoted.split(' '));
                if let Err(error) = Cli::command().try_get_matches_from(words) {
                    panic!("{example}: {error}");
                }
            }
        }
    }
}
